"""What is known of hangs, as data: the table, and the situations to which its rows apply."""
