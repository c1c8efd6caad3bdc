"""What node and workers share: files, mailboxes, pipes, slots."""
