"""Building blocks of architecture tables: attention, MLPs and routed experts."""
