"""The report: one page of HTML that needs nothing else, and every number of it as JSON."""
