"""The student: asked, trained anew, put back as an ordinary model."""
