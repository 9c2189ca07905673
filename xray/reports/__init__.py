"""HTML pages, tables and figures of reports. They may read data, but not artifacts."""
