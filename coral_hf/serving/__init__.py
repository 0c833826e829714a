"""Drafters inside serving engines, each in files that import it and that nothing else imports."""
