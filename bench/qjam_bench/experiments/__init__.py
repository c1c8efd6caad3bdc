"""One module for each subcommand, with `links` and `footprint`, which run as programs of their own."""
