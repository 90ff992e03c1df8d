"""What `normatch bench` measures. `measure` is the harness, `rivals` the formulations that ours are compared with."""
