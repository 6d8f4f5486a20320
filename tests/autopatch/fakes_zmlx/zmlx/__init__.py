"""Stands in for zmlx where a test is about the hook alone; marks models instead of patching."""
