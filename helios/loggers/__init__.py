"""Where a run writes what it has to say."""
