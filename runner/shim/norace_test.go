//go:build !race

package shim

const withRace = false
