"""The backward for sm_90 in Gluon, two kernels: one owns query rows and walks keys, the other owns keys and walks rows.

`queries` and `keys` hold what a program of each shares and its producer, the consumers are files of their own. The sums
are those of `attention/backward.py`, in its order.
"""
