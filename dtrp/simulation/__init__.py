"""How fast a plan would train on a machine that is not here: the stages' own lists, and a clock."""
