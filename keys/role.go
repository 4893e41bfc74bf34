package keys

import "slices"

// ladder is the order of the roles of people, lowest first. Runner is not on it.
var ladder = [...]Role{Guest, Student, Power, Staff, Admin}

// rank returns r's place on the ladder. A role that raid.toml adds ranks as a
// student; no role at all, and a machine's, rank below everybody.
func (r Role) rank() int {
	if i := slices.Index(ladder[:], r); i >= 0 {
		return i
	}
	if r == "" || r == Runner || r == Door {
		return -1
	}
	return 1
}

// AtLeast reports whether r may do what min may. The roles of people form a ladder
// (guest, student, power, staff, admin; a role added in raid.toml stands beside
// student). A runner is a machine: only Runner is at least Runner, and Runner is at
// least nothing else, so an admin's key cannot take jobs nor a runner's submit them.
// The same holds for Door.
func (r Role) AtLeast(min Role) bool {
	if r == Runner || r == Door || min == Runner || min == Door || min == "" {
		return r == min && r != ""
	}
	return r.rank() >= min.rank()
}

// MayEnroll reports whether somebody of role r may enrol a user as role will who
// is now of role was ("" for a new user). Admins may everything. Staff may enrol
// people below staff, and only those: enrolling adds a key, so staff who could
// "update" an admin could also log in as one.
func (r Role) MayEnroll(was, will Role) bool {
	if r == Admin {
		return true
	}
	below := func(x Role) bool { return x != Runner && x != Door && !x.AtLeast(Staff) }
	return r == Staff && below(was) && below(will)
}
