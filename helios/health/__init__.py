"""Numbers gone bad: how they are found, and what is done then."""
