"""What is chosen by measuring it on this machine: a drafter's draft head, and its tree."""
