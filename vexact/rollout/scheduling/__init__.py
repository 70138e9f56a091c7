"""What runs next, and in which pages."""
