"""What is not drafted, and when that is: transformers' own loop, costs, and the policy."""
