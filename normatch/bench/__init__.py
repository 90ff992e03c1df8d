"""What `normatch bench` measures. `measure` is the harness, `rivals` are the formulations that ours are compared with."""
