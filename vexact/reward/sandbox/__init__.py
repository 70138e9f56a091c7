"""What holds a grader: a scrubbed environment, limits, no network, no writing outside a scratch folder, a warden.

Everything here works without privileges, on the system calls of Linux alone; what a kernel lacks is reported, and
``vexact doctor`` prints it. Imported by grader processes before any foreign code: standard library only.
"""
