package job

// A BoxOrder is the payload of an [Order] frame: all that a box is ever told. It is
// the first frame into a box. With Source, [File] frames with a plain tar follow and
// an empty one ends them. After that the wire stays open for [Stop]; closing it ends
// the box.
type BoxOrder struct {
	Spec   Spec     `json:"spec"`
	Env    []string `json:"env,omitempty"`    // NAME=value: the whole environment of the steps
	Source bool     `json:"source,omitempty"` // File frames follow
}
