"""One host: takes work from the master, gives it to the workers, sends their results back."""
