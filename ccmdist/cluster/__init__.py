"""What a process has to know of the machines around it: its rank, its peers, its signals, its run folder."""
