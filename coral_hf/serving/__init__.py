"""Plug-ins of serving engines; nothing else imports them."""
