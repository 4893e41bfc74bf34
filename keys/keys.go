// Package keys says who someone is: public keys, roles, teams, enrolment.
//
// Identity comes from a key whose signature was checked and from nothing else; the
// login name on the wire is ignored. The package holds the rules and the records;
// it does no I/O on raid's store and imports nothing of ours.
package keys

// A Role says what somebody may do.
type Role string

const (
	Guest   Role = "guest" // a key nobody enrolled
	Student Role = "student"
	Power   Role = "power"
	Staff   Role = "staff"
	Admin   Role = "admin"
	Runner  Role = "runner" // a machine; may do nothing a person may
	Door    Role = "door"   // another raid of the same deployment; it brings people's sessions
)

// An Identity is who a verified key belongs to, at the moment of login.
type Identity struct {
	User        string // "" for a guest
	Role        Role
	Team        string
	Fingerprint string // SHA256:… of the verified key
}
