"""What experiments share: parties, hosts, figures, pictures, options."""
