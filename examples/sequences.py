"""Params and data to try `bin/qjam run` with."""

three = 3
onetoten = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
