"""`fomoe plan`: which settings of a federation fit, how long they take, and why others do not."""
