"""HTML pages, tables and figures. Knows data, never artifacts."""
