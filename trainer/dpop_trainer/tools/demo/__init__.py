"""The demonstration: DPO against DPOP on generated low-edit pairs, offline, in minutes on a CPU."""
