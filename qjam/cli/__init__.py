"""The subcommands of the program qjam: each module has a SUMMARY and `main(arguments)`, which gives the exit status."""
