"""What people touch: the command line, and the functions of the public API."""
