"""Every family, one file each, made of the parts in `polyhead.nn`."""
