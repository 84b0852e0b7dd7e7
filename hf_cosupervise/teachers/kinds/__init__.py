"""One file per kind of teacher."""
