"""The K-step REINFORCE loop: stream scored rollouts, weigh tokens by their returns, step, refresh."""
