"""The subcommands of qjam. Each has a SUMMARY and `main(arguments, program)`, which gives the exit status."""
