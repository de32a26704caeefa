"""What happens when: Prefect flows and their tasks. They hold order, retries and artifacts; every rule is in `tutelage`, every
computation in `training`, which they start as processes."""
