"""What the experiments share: parties, hosts, figures, plots, options."""
