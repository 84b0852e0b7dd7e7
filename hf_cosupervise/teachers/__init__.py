"""Teachers run, once; nothing else runs one."""
