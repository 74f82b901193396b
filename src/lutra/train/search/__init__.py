"""The search for the fastest or smallest recipe within a budget of quality and time."""
