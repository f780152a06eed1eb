"""The attention viewer: what it shows, where its maps come from, and its page without a kernel."""
