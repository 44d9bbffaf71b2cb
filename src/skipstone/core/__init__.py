"""Floor 1: the seam. What tokens are, what a mechanism returns, what a cache keeps. No parameters live here."""
