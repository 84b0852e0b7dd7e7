"""The Hub and its cards."""
