//go:build !linux

package store

// refuseNetwork knows the file systems of Linux only.
func refuseNetwork(string) error { return nil }
