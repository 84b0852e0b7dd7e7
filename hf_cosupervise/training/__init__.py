"""Training down the hierarchy, level by level; it never runs a teacher."""
