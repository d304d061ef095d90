"""The report: run directories → figures' data → pictures → one page."""
