"""Bridges to optional packages, each imported only when its objects arrive."""
