//go:build race

package shim

// withRace: the race detector keeps shadows of all memory.
const withRace = true
