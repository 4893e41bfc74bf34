package main

import (
	"reflect"
	"testing"
)

// contrib/raid.toml is the manual of raid.toml: it has to say what is so.
func TestExampleHoldsTheDefaults(t *testing.T) {
	got, err := readConfig("../../contrib/raid.toml")
	if err != nil {
		t.Fatal(err)
	}
	got.Box.Images, got.Queue.Weights = nil, nil // empty tables, there to be filled
	if want := defaults(); !reflect.DeepEqual(got, want) {
		t.Errorf("readConfig(contrib/raid.toml) = %+v, want the defaults, %+v", got, want)
	}
}
