"""What recorded traffic shows of the router, offline: files in, a report out. Serves nothing and changes nothing."""
