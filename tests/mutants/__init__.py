"""Single faults planted on purpose, one at a time: what no test notices is listed. ``make mutants ROOM=rows``."""
