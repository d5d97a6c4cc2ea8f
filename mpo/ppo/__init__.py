"""PPO: equations, rewards, rollout, update."""
