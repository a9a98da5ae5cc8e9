"""What is measured: the table of statistics, who sees whom, and the container of the results."""
