"""What the model wrote: files of every sample, and a few of them as rows of a table."""
