"""Asks: arrivals, the open-loop driver, checks of the answers, sample functions, reports."""
